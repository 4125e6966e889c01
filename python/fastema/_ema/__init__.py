"""The parts of `fastema.EMA`, one question each; the class itself is their face."""
