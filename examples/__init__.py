"""Trainings that show how Sidestep is used."""
