"""What is measured on calibration data: Grams, Fisher information, sensitivities."""
