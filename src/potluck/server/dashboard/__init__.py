"""The operator's pages: queries, rendering, events and signing in."""
