"""What goes over the wire, and the clients that speak it. PROTOCOL.md is the authority."""
