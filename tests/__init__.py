"""A package, so that no other one of this name, which some wheels bring, is found in its place."""
