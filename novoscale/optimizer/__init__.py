"""NovoGrad: its options, presets, param groups, the tables of a step, telemetry, gradient release."""
