// Owns what one process may do to another of the same user: watch it end, and take a copy of a file descriptor.
#ifndef DEEP_EP_CORE_LOOPBACK_PROCESS_H
#define DEEP_EP_CORE_LOOPBACK_PROCESS_H

#include <stdbool.h>

// Lets every process of this user take descriptors and memory of this one, where Yama would allow that to parents only.
void process_allow_peers(void);

// A descriptor that becomes readable when the process ends; -1 when there is no such process.
int process_open(int pid);

bool process_is_alive(int pidfd);

// A copy of a descriptor of another process, closed on exec; -1 on failure, with errno set.
int process_copy_fd(int pidfd, int fd);

#endif
