"""The EC2 API: Query requests in, XML out."""
