"""The report as one HTML page that needs no network; `html.page` writes it."""
