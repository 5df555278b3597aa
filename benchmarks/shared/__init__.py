"""What the questions share: models, measuring, rows on disk, tables and pictures."""
