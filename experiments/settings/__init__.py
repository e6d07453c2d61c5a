"""What a run is asked to be: typed configuration, its checks and errors, names, environment."""
