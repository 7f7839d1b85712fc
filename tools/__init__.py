"""Tools around the trainer: many runs, reports, measurements, and the scaling law."""
