/* Empty: bcc wants the file to exist, nothing of ours needs what the kernel's one declares. */
