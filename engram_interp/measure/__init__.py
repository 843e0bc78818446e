"""Pure tensor maths: no model, no file, no randomness that was not passed in."""
