"""The embedded default: a small world in which truth can be measured from pixels, its base model and preferences."""
