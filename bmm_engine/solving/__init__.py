"""The algebra of one linear module: moments, MAP solves, spectra, output metrics, posteriors."""
