"""What `ditty_di.graph` is made of."""
