"""One module for each framework: it turns what the framework has into layouts, and registers names."""
