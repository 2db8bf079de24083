"""Reading a model: its parts, its hook points, and one run with captures and interventions."""
