"""Reports: tables, figures, page, and what they read of finished runs."""
