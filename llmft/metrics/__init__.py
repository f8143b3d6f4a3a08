"""Pure functions: references and predictions to a number."""
