"""What a run says in words and pictures: tokens as text, tables, thumbnails."""
