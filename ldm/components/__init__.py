"""What the folder of a component must hold before anything is built from it: configuration, weights, neighbours."""
