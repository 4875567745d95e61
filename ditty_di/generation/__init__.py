"""Text generation: read prompts, continue them, decode them."""
