"""Sites, knobs, the space, the configuration."""
