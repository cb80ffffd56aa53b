"""The application: one composition root over the packages below it."""
