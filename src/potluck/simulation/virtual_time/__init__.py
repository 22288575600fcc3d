"""Virtual time: what the rounds would have taken on real devices."""
