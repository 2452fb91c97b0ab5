/* Short names for what Cython has generated; to be included behind the generated file. */
#define CORE(name) __pyx_e_8ublk_ubi_5_core_##name
#define RING(name) __pyx_e_8ublk_ubi_5_ring_##name
#define THREAD(name) __pyx_e_8ublk_ubi_8_threads_##name
#define THREADS(name) __pyx_f_8ublk_ubi_8_threads_##name
#define MAILBOX(name) __pyx_f_8ublk_ubi_8_mailbox_##name
#define RING_CALL(name) __pyx_f_8ublk_ubi_5_ring_##name

typedef struct __pyx_t_8ublk_ubi_5_core_Action Action;
typedef struct __pyx_t_8ublk_ubi_5_core_Actions Actions;
typedef struct __pyx_t_8ublk_ubi_5_core_Event Event;
typedef struct __pyx_t_8ublk_ubi_5_core_Shared Shared;
typedef struct __pyx_t_8ublk_ubi_5_ring_Op Op;
typedef struct __pyx_t_8ublk_ubi_5_ring_Ring Ring;
typedef struct __pyx_t_8ublk_ubi_6_queue_Queue Queue;
typedef struct __pyx_t_8ublk_ubi_6_queue_Request Request;
typedef struct __pyx_t_8ublk_ubi_8_mailbox_Doorbell Doorbell;
typedef struct __pyx_t_8ublk_ubi_8_mailbox_Mailbox Mailbox;
typedef struct __pyx_t_8ublk_ubi_8_mailbox_Message Message;
typedef struct __pyx_t_8ublk_ubi_8_threads_Device Device;
typedef struct __pyx_t_8ublk_ubi_8_threads_HydratorThread HydratorThread;
typedef struct __pyx_t_8ublk_ubi_8_threads_QueueThread QueueThread;
typedef struct __pyx_t_8ublk_ubi_8_threads_ThreadBase ThreadBase;
typedef struct __pyx_t_8ublk_ubi_9_hydrator_Fetch Fetch;
typedef struct __pyx_t_8ublk_ubi_9_hydrator_HydratorMemory HydratorMemory;
typedef struct __pyx_t_8ublk_ubi_9_hydrator_Waiter Waiter;
typedef struct __pyx_t_8ublk_ubi_9_hydrator_WaiterList WaiterList;
