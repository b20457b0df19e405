"""What people look at: terminal tables and self-contained HTML. No secret and no network in either."""
