"""Object storage and SFTP as `llmtrain prep` sees them: a few operations on whole files.

The clients are those that Streaming's downloaders use (boto3, google-cloud-storage, azure-storage-blob, paramiko) with
the same environment variables: what prep can read and write, the training loader can read, too.
"""
