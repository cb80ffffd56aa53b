-- The contract is as before, but for a command that names a lock: it is taken once nothing above it refuses, before the
-- budgets. What is refused after that leaves a row of a grant that never was, which holds nobody up.
CREATE OR REPLACE FUNCTION engine_admit_otherwise_v6(
    c jsonb, p_group uuid, p_agent text, p_cancelling boolean, p_halts boolean, p_reserving jsonb
) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_tenant  uuid := (c ->> 'tenant_id')::uuid;
    v_run_id  uuid := (c ->> 'run_id')::uuid;
    v_begins  boolean := (c ->> 'begin')::boolean;
    v_halt    jsonb;
    v_verdict jsonb;
    v_state   text;
    v_answer  jsonb;
    v_event   jsonb;
    v_seq     bigint;
BEGIN
    v_verdict := jsonb_build_object('outcome', c #> '{decision,outcome}', 'reason', c #> '{decision,reason}',
        'message', c #> '{decision,message}', 'rule', c #> '{decision,rule}', 'unblock', c #> '{decision,unblock}',
        'guidance', c #> '{decision,guidance}', 'retry_after_ms', c #> '{decision,retry_after_ms}');
    IF p_halts THEN
        v_halt := engine_standing_halt_v2(v_tenant, v_run_id, p_group, p_agent, c ->> 'capability');
    END IF;
    IF v_halt IS NOT NULL THEN
        v_verdict := v_verdict || engine_halted_v2(v_halt);
    ELSIF v_begins AND p_cancelling THEN
        v_verdict := v_verdict || '{"outcome": "deny", "reason": "cancel_requested", "rule": "cancel",
            "message": "the run is being cancelled", "unblock": "nothing: somebody cancelled the run"}';
    ELSIF v_verdict ->> 'outcome' = 'ask' THEN
        v_verdict := v_verdict || engine_ticket_v2(c);
    END IF;
    IF v_verdict ->> 'outcome' = 'allow' AND c ? 'lock' THEN
        v_verdict := v_verdict || engine_take_lock_v1(c);
    END IF;
    IF v_verdict ->> 'outcome' = 'allow' THEN
        v_verdict := v_verdict || COALESCE(p_reserving, engine_reserve_v4(v_tenant, c -> 'reserve'));
    END IF;

    v_state := CASE v_verdict ->> 'outcome' WHEN 'allow' THEN 'granted' WHEN 'ask' THEN 'awaiting_approval'
                                            WHEN 'steer' THEN 'steered' ELSE 'denied' END;
    IF v_state = 'awaiting_approval' AND v_verdict ->> 'ticket_id' IS NULL THEN
        v_verdict := v_verdict || jsonb_build_object('ticket_id', c #> '{ticket,id}', 'opens', true);
    END IF;
    v_answer := jsonb_strip_nulls(v_verdict - '{outcome,reserved,opens}'::text[]) || jsonb_build_object(
        'status', CASE v_state WHEN 'awaiting_approval' THEN 'pending' ELSE v_state END, 'replayed', false);
    IF v_state = 'granted' THEN
        v_answer := v_answer || engine_grant_v5(c, v_answer, v_verdict, v_begins);
    ELSE
        v_answer := v_answer || engine_write_attempt_v4(c, v_state, v_answer, v_verdict);
    END IF;

    v_event := jsonb_strip_nulls(jsonb_build_object('step', c -> 'step_index', 'step_id', c -> 'step_id',
        'attempt', c -> 'attempt', 'capability', c -> 'capability', 'resource', c -> 'resource',
        'digest', c -> 'digest', 'policy_digest', c -> 'policy_digest', 'decision', c -> 'decision',
        'answer', v_answer - 'replayed', 'reserved', v_verdict -> 'reserved'));
    IF v_begins AND v_state = 'granted' THEN
        v_seq := engine_append_events_v1(v_tenant, 'run/' || v_run_id, c ->> 'actor', ARRAY['step_granted', 'step_started'],
            ARRAY[v_event, jsonb_build_object('step', c -> 'step_index', 'attempt', c -> 'attempt',
                                              'grant_id', v_answer -> 'grant_id')]);
        v_answer := v_answer || '{"begun": true}';
    ELSE
        v_seq := engine_append_event_v3(v_tenant, 'run/' || v_run_id,
            CASE v_state WHEN 'awaiting_approval' THEN 'approval_requested' ELSE 'step_' || v_state END, c ->> 'actor', v_event);
    END IF;
    INSERT INTO idempotency_records (tenant_id, operation, command_id, digest, result)
        VALUES (v_tenant, 'admit', c ->> 'command_id', c ->> 'command_digest', v_answer);
    RETURN v_answer;
END
$$;
