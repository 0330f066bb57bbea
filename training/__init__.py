"""How the built-in model was made: synthetic camera streams, the engine's own layouts, and a short training."""
