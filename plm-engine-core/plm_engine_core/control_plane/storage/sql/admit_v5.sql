-- Books one decision: refuses, parks on a ticket, or reserves and grants. One call, one transaction.
-- As version 4; where the command says `begin`, the grant is used up with it, as engine_begin_v4 would in a transaction
-- right after: the same rows, the same two events. Every check of that one is made here already, but for a cancel that was
-- asked for: then nothing is granted. The answer says `begun`.
-- Locks, always in this order: policy and halt scopes (shared), run, ticket or approval scope, budgets from narrow to wide,
-- grant, stream head. The run guards the idempotency records of its commands: they are read and written while it is held.
-- The command `c` is built by storage/commands; every key it reads is written there.
-- Each call of a function that pins its search_path has its cost, so what every admission does stands here;
-- what only some do is in the functions of halts_v2, tickets_v2, budgets_v4, and of admit_v4.
CREATE FUNCTION engine_admit_v5(c jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_tenant  uuid := engine_enter_v2((c ->> 'tenant_id')::uuid);
    v_run_id  uuid := (c ->> 'run_id')::uuid;
    v_begins  boolean := (c ->> 'begin')::boolean;
    v_run     record;
    v_above   record;
    v_record  record;
    v_halt    jsonb;
    v_verdict jsonb;
    v_state   text;
    v_answer  jsonb;
    v_event   jsonb;
    v_seq     bigint;
BEGIN
    -- What a run belongs to never changes, so it may be read before the run is locked: with the locks of engine_lock_above_v3,
    -- in the statement before the one that relies on them.
    SELECT run_group_id AS group_id, agent_id, num_nulls(
            pg_advisory_xact_lock_shared(hashtextextended('policy', 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/system', 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/tenant/' || v_tenant, 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/agent/' || v_tenant || '/' || agent_id, 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/run_group/' || run_group_id, 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/run/' || run_id, 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/capability/' || v_tenant || '/' || (c ->> 'capability'), 0)))
        INTO v_above FROM run_states WHERE tenant_id = v_tenant AND run_id = v_run_id;
    SELECT fencing_token = (c ->> 'fencing_token')::bigint AND state = 'running' AND lease_expires_at > clock_timestamp() AS held,
           cancel_requested_at IS NOT NULL AS cancelling,
           EXISTS (SELECT FROM halts_system WHERE lifted_at IS NULL)
               OR EXISTS (SELECT FROM halts WHERE tenant_id = v_tenant AND lifted_at IS NULL) AS halts,
           (SELECT digest FROM policy_activations WHERE role = 'active' ORDER BY number DESC LIMIT 1) AS policy
        INTO v_run FROM run_states WHERE tenant_id = v_tenant AND run_id = v_run_id FOR UPDATE;

    SELECT digest, result INTO v_record FROM idempotency_records
        WHERE tenant_id = v_tenant AND operation = 'admit' AND command_id = c ->> 'command_id';
    IF FOUND THEN
        RETURN engine_recalled_v5(c, v_record.digest, v_record.result);
    END IF;
    IF v_run.held IS NOT TRUE THEN
        PERFORM engine_hold_run_v1(v_tenant, v_run_id, (c ->> 'fencing_token')::bigint, true);  -- says what is amiss
    END IF;
    IF v_run.policy <> c ->> 'policy_digest' THEN
        -- Nothing is written, not even this answer: the same command may come again, decided anew.
        RETURN jsonb_build_object('status', 'policy_changed', 'message', format(
            'policy %s decided, and meanwhile policy %s was activated',
            left(c ->> 'policy_digest', 12), left(v_run.policy, 12)));
    END IF;

    v_verdict := jsonb_build_object('outcome', c #> '{decision,outcome}', 'reason', c #> '{decision,reason}',
        'message', c #> '{decision,message}', 'rule', c #> '{decision,rule}', 'unblock', c #> '{decision,unblock}',
        'guidance', c #> '{decision,guidance}', 'retry_after_ms', c #> '{decision,retry_after_ms}');
    IF v_run.halts THEN
        v_halt := engine_standing_halt_v2(v_tenant, v_run_id, v_above.group_id, v_above.agent_id, c ->> 'capability');
    END IF;
    IF v_halt IS NOT NULL THEN
        v_verdict := v_verdict || engine_halted_v2(v_halt);
    ELSIF v_begins AND v_run.cancelling THEN
        v_verdict := v_verdict || '{"outcome": "deny", "reason": "cancel_requested", "rule": "cancel",
            "message": "the run is being cancelled", "unblock": "nothing: somebody cancelled the run"}';
    ELSIF v_verdict ->> 'outcome' = 'ask' THEN
        v_verdict := v_verdict || engine_ticket_v2(c);
    END IF;
    IF v_verdict ->> 'outcome' = 'allow' THEN
        v_verdict := v_verdict || engine_reserve_v4(v_tenant, c -> 'reserve');
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

-- Writes the attempt as granted, with its grant, issued or begun already, and answers what that adds.
CREATE FUNCTION engine_grant_v5(c jsonb, p_answer jsonb, p_verdict jsonb, p_begins boolean) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_tenant  uuid := (c ->> 'tenant_id')::uuid;
    v_run_id  uuid := (c ->> 'run_id')::uuid;
    v_step    integer := (c ->> 'step_index')::integer;
    v_attempt integer := (c ->> 'attempt')::integer;
    v_grant   uuid := (c #>> '{grant,id}')::uuid;
    v_now     timestamptz := clock_timestamp();
    v_begun   timestamptz := CASE WHEN p_begins THEN v_now END;
    v_expires timestamptz := v_now + make_interval(secs => (c #>> '{grant,seconds}')::double precision);
    v_issued  jsonb;
BEGIN
    WITH attempt AS (
        INSERT INTO run_steps (tenant_id, run_id, step_index, attempt, step_id, step_key, capability, resource, arguments,
                arguments_digest, executor_kind, state, decision, grant_id, ticket_id, started_at)
            VALUES (v_tenant, v_run_id, v_step, v_attempt, c ->> 'step_id', c ->> 'step_key', c ->> 'capability',
                c ->> 'resource', c -> 'arguments', c ->> 'digest', c ->> 'executor_kind',
                CASE WHEN p_begins THEN 'running' ELSE 'granted' END, c -> 'decision', v_grant,
                (p_answer ->> 'ticket_id')::uuid, v_begun)
            ON CONFLICT (tenant_id, run_id, step_index, attempt) DO NOTHING RETURNING grant_id)
    INSERT INTO grants (tenant_id, id, run_id, step_index, attempt, digest, policy_digest, span_id, fencing_token,
            state, issued_at, begun_at, expires_at, reserved)
        SELECT v_tenant, grant_id, v_run_id, v_step, v_attempt, c ->> 'digest', c ->> 'policy_digest', c #>> '{grant,span_id}',
            (c ->> 'fencing_token')::bigint, CASE WHEN p_begins THEN 'begun' ELSE 'issued' END, v_now, v_begun, v_expires,
            p_verdict -> 'reserved'
        FROM attempt;
    IF FOUND THEN
        IF p_verdict ?| ARRAY['ticket_id', 'approval_scope_id'] THEN
            PERFORM engine_use_approval_v2(v_tenant, p_verdict);
        END IF;
        RETURN jsonb_build_object('grant_id', v_grant, 'span_id', c #> '{grant,span_id}', 'expires_at', v_expires);
    END IF;

    v_issued := engine_write_attempt_v4(c, 'granted', p_answer, p_verdict);  -- it waited for approval, or says what is amiss
    IF p_begins THEN
        UPDATE grants SET state = 'begun', begun_at = v_begun WHERE tenant_id = v_tenant AND id = v_grant
            AND run_id = v_run_id AND step_index = v_step AND attempt = v_attempt;
        UPDATE run_steps SET state = 'running', started_at = v_begun
            WHERE tenant_id = v_tenant AND run_id = v_run_id AND step_index = v_step AND attempt = v_attempt;
    END IF;
    RETURN v_issued;
END
$$;

-- What a command was answered before. A grant that it used up is good for one call, of whoever held the run when it was
-- given and holds it still: to everybody else it is refused as by engine_begin_v4, and once it is settled, to all.
CREATE FUNCTION engine_recalled_v5(c jsonb, p_digest text, p_answer jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_tenant  uuid := (c ->> 'tenant_id')::uuid;
    v_run_id  uuid := (c ->> 'run_id')::uuid;
    v_grant   uuid := (p_answer ->> 'grant_id')::uuid;
    v_fencing bigint := (c ->> 'fencing_token')::bigint;
    v_answer  jsonb := engine_recalled_v3(c, p_digest, p_answer);
BEGIN
    IF NOT p_answer ? 'begun' THEN
        RETURN v_answer;
    END IF;
    PERFORM engine_hold_run_v1(v_tenant, v_run_id, v_fencing, true);
    PERFORM FROM grants WHERE tenant_id = v_tenant AND id = v_grant AND run_id = v_run_id
        AND step_index = (c ->> 'step_index')::integer AND attempt = (c ->> 'attempt')::integer
        AND state = 'begun' AND fencing_token = v_fencing;
    IF FOUND THEN
        RETURN v_answer;
    END IF;
    RETURN engine_unusable_v2(v_tenant, v_run_id, v_grant, v_fencing) || '{"status": "denied", "replayed": true}';
END
$$;
