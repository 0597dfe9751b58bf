"""States of other optimizers: Adam's, and other NovoGrads'."""
