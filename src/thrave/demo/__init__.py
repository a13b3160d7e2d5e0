"""What `thrave demo` is made of: a Windows-like disk made on the spot, and the job done on it with boto3."""
