"""Where documents and records come from: files, object stores, the Hub, what ships with Python."""
