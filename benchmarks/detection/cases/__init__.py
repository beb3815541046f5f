"""The lab's cases: tuned ones, known ones (held out once, judged once, now known to who tunes), and held-out ones."""
