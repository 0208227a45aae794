"""The virtual database `cenote`: what the daemon shows of itself to the users in `admin_users`. It only shows."""
