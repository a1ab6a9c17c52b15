"""The course: eight pages, the pictures in them, and exercises that the tests grade."""
