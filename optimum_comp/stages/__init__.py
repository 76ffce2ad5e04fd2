"""The chain from a dense model to a bundle: stages, each kept under a key, and recipes that say which."""
