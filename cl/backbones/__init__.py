"""Networks. A backbone is built for a stream, maps a `Batch` to an `Output`, and leaves its last layer to a head."""
