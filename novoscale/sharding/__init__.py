"""Where parameters lie: layers, fragments, quantisation blocks, DTensors, and the collectives of a step."""
