"""The front door: EC2 Query requests in, XML out."""
