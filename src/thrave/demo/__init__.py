"""`thrave demo`: a Windows-like disk, and the steps that bundle it with boto3."""
