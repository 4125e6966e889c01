"""The parts of `fastema.jax`: trees, decays in a step, and how averages move."""
