/* bcc sizes perf and ring buffers of its own with this; ours are created by bpf(2). */
#define PAGE_SIZE 4096
