"""A whole data set explained: resumable results in Parquet, a report, and where a model leans on what means nothing."""
