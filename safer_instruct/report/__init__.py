"""Reports: tables, figures and the HTML page, and the code that reads finished runs for them."""
