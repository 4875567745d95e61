"""Which row comes when: deterministic orders, mixtures in exact ratios, random numbers of rows."""
