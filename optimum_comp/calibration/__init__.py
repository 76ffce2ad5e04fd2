"""Text for calibration: what is given, and what the model writes itself."""
