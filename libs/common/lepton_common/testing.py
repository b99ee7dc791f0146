"""pytest plugin: the real servers, started once a session and only when a test asks for them."""
