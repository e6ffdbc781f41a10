/* Stands in for the kernel's own header; bcc wants it to exist. */
#define CONFIG_BPF_SYSCALL 1
