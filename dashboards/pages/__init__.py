"""One file a page. What a page shows is computed by the pure modules beside this folder."""
