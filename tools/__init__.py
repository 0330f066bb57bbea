"""One file, one command; each talks to the node only through `onlooker.protocol`."""
