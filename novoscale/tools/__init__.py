"""What the commands share: local ranks, configs, plots, provenance."""
